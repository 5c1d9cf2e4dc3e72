"""Shared parts of the pre-training, fine-tuning and probing scripts; one thing has one home here."""
