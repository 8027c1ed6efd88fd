# An image with `mora-ds`. CUDA:
#   docker build -t mora_ds .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --stop-timeout 300 --user "$(id -u):$(id -g)" -v "$PWD:/work" \
#     mora_ds pretrain configs/recipes/continual.yaml ...
#   several nodes with InfiniBand: also --network host --device /dev/infiniband
# CPU:
#   docker build -t mora_ds:cpu --build-arg IMAGE=python:3.12-slim --build-arg PIP_EXTRA_INDEX_URL=INDEX_OF_CPU_TORCH .
#   docker run --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" mora_ds:cpu pretrain --num_gpus 2
# --ipc host: processes of a node exchange data through shared memory; a container has only 64 MB of it otherwise.
# --ulimit memlock: --base_device host and InfiniBand lock memory.
# --stop-timeout: `docker stop` makes all ranks save and exit, and kills them after 10 s if nothing else is said. It must be
# enough for one step, one checkpoint, and a merge if you merge.
# --user: files in /work belong to you.
# Before torch 2.10, the first version with grouped products, the host waits for the GPU in every layer of experts.
ARG IMAGE=pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime
FROM ${IMAGE}

# Triton compiles its kernels with these.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev && rm -r /var/lib/apt/lists/*

# The CUDA image keeps its torch. The CPU image installs it from the given index, or from the default one. pip refuses the
# Python of a Debian or Ubuntu image without PIP_BREAK_SYSTEM_PACKAGES.
ARG PIP_EXTRA_INDEX_URL
COPY setup.cfg pyproject.toml README.md LICENSE /source/
COPY configs /source/configs
COPY mora_ds /source/mora_ds
RUN PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir /source && rm -r /source
RUN python -c "from mora_ds.engine.device import check_compiler; check_compiler()"

# Any user may run it: caches go to HOME, and torch asks for a user's name, which a bare id has not.
ENV HOME=/tmp USER=mora
RUN mkdir -p -m 1777 /work
USER 1000:1000
WORKDIR /work
STOPSIGNAL SIGTERM
ENTRYPOINT ["mora-ds"]
