# Everything that a run needs, but for the images and, for CUDA, the driver, which is the machine's own.
#
#   docker build --target run -t mae .
#   docker build --target run -t mae-cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --gpus all --ipc=host -v DIR:/data:ro -v OUT:/out mae main_pretrain.py \
#       --data_path /data --output_dir /out
#   docker build --target test -t mae-test . && docker run --rm --ipc=host mae-test
#
# Processes run as user 1000, who must be able to write OUT; or pass --user $(id -u).

FROM debian:trixie-slim AS base
# Where torch comes from: PyPI's has CUDA, the one above has none, .../whl/cu126 is for older drivers
ARG TORCH_INDEX=https://pypi.org/simple
# The compiler and headers are for torch.compile. USER, because another --user has no name.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 mae \
    && python3 -m venv /opt/mae
ENV PATH=/opt/mae/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 USER=mae XDG_CACHE_HOME=/tmp/cache
WORKDIR /mae
COPY requirements.txt ./
RUN grep '^torch' requirements.txt > /tmp/torch.txt \
    && pip install --index-url "$TORCH_INDEX" -r /tmp/torch.txt \
    && pip install -r requirements.txt \
    && rm /tmp/torch.txt

FROM base AS test
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*
COPY requirements-dev.txt ./
RUN pip install -r requirements-dev.txt
COPY --chown=mae . .
RUN chown mae .
USER 1000
CMD ["python", "-m", "pytest", "-n", "2", "--dist", "loadfile"]

FROM base AS run
COPY . .
RUN chown mae .
USER 1000
ENTRYPOINT ["python"]
CMD ["main_pretrain.py", "--help"]
