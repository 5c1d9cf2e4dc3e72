"""Files on disk: written beside, then renamed, so that no reader ever sees half of one."""
