# kvserve in a container: llama.cpp is built from source for CUDA (the default) or for the CPU.
#
#   docker build -t kvserve .
#   docker build -t kvserve:cpu --build-arg BACKEND=cpu .
#
# Without a Docker engine or a registry: scripts/image. What may be set, and why: docs/docker.md.

ARG BACKEND=cuda
# Blackwell needs 12.8 or newer.
ARG CUDA_VERSION=12.8.1
ARG CPU_BASE=debian:bookworm-slim
ARG CUDA_BUILD_BASE=nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04
ARG CUDA_BASE=nvidia/cuda:${CUDA_VERSION}-base-ubuntu24.04

FROM ${CPU_BASE} AS build-cpu

FROM ${CUDA_BUILD_BASE} AS build-cuda

FROM ${CPU_BASE} AS run-cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

FROM ${CUDA_BASE} AS run-cuda
ARG CUDA_VERSION
# Of CUDA's libraries llama.cpp needs the runtime, which the base has, and cuBLAS.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 python3 tini \
        "libcublas-$(echo "$CUDA_VERSION" | cut -d. -f1,2 | tr . -)" \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

FROM build-${BACKEND} AS build
ARG BACKEND
# Turing, Ampere, Ada and Blackwell cards for people's desks; the last also as PTX for what comes.
ARG CUDA_ARCHS="75-real;86-real;89-real;120a-real;120-virtual"
# The pairs that kvserve chooses among (kvserve/core/dtypes.py).
ARG FA_QUANTS="f16-f16,bf16-bf16,q8_0-q8_0,q8_0-q5_1,q8_0-q4_0,q5_1-q4_0,q4_0-q4_0"
# More flags for llama.cpp, which win over those here.
ARG CMAKE_ARGS=""
ARG JOBS=""
# Read by pip, for a mirror or a proxy: they are not part of the image.
ARG PIP_INDEX_URL
ARG PIP_CERT
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-venv

COPY scripts/constraints.txt /build/
RUN python3 -m venv /opt/kvserve

# llama.cpp, apart from kvserve's own files, so that a change of those does not compile it again.
# GGML_NATIVE would build for this machine's processor; LLAVA_BUILD is for images as input.
RUN set -eu; \
    flags="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"; \
    if [ "$BACKEND" = cuda ]; then \
        flags="$flags -DGGML_CUDA=ON -DGGML_CUDA_FA_QUANTS=$FA_QUANTS"; \
        flags="$flags -DCMAKE_CUDA_ARCHITECTURES=$CUDA_ARCHS"; \
        # libcuda.so.1 is the driver's, and comes with the card.
        flags="$flags -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--allow-shlib-undefined"; \
    fi; \
    version="$(sed -n 's/^llama-cpp-python==//p' /build/constraints.txt)"; \
    CMAKE_ARGS="$flags $CMAKE_ARGS" CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}" \
        /opt/kvserve/bin/python -m pip install --no-cache-dir \
        --constraint /build/constraints.txt --no-binary llama-cpp-python \
        "llama-cpp-python==$version"; \
    # A wheel cannot hold links, so it has each library three times.
    cd /opt/kvserve/lib/python3*/site-packages/llama_cpp/lib; \
    for library in *.so; do \
        for copy in "$library".*; do cmp -s "$library" "$copy" && ln -sf "$library" "$copy"; done; \
    done

COPY pyproject.toml README.md LICENSE /build/
COPY scripts/build_compiled.py /build/scripts/
COPY kvserve /build/kvserve
# pip itself has nothing to do in the image, nor have NumPy's tests.
RUN /opt/kvserve/bin/python -m pip install --no-cache-dir --constraint /build/constraints.txt \
        /build \
    && /opt/kvserve/bin/python -m pip uninstall --yes pip setuptools \
    && find /opt/kvserve -type d -name tests -path '*/numpy/*' -prune -exec rm -rf {} + \
    && /opt/kvserve/bin/python -m compileall -q /opt/kvserve/lib

FROM run-${BACKEND}
COPY --from=build /opt/kvserve /opt/kvserve
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /state --shell /usr/sbin/nologin \
        kvserve \
    && mkdir /models /state \
    && chown kvserve:kvserve /state \
    && chmod 700 /state \
    && ln -s /opt/kvserve/bin/kvserve /usr/local/bin/kvserve

# All settings are KVSERVE_* (docs/configuration.md). Outside its own network namespace the server
# would be unreachable on 127.0.0.1, so a key is needed: KVSERVE_API_KEY.
ENV KVSERVE_HOST=0.0.0.0 \
    KVSERVE_PORT=8000 \
    KVSERVE_STATE_DIR=/state \
    HOME=/state \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/models", "/state"]
WORKDIR /models
EXPOSE 8000
USER kvserve:kvserve

HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["/opt/kvserve/bin/python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['KVSERVE_PORT'] + '/health/ready', timeout=4)"]

# tini hands SIGTERM on and reaps what a dying worker leaves.
ENTRYPOINT ["tini", "--", "kvserve"]
CMD ["start"]
