# The image contains the project's wheel and the packages of requirements-image.lock, nothing else above the base.
# All extras are installed, so a shared store, traces and a SOCKS proxy only need settings.
#
#     docker build --tag sd-progress-gateway .        or: buildah bud --format docker --tag sd-progress-gateway .
#     docker run --publish 127.0.0.1:8080:8080 --read-only --cap-drop ALL \
#       --env SPEEDPIX_APP_KEY --env SPEEDPIX_APP_SECRET sd-progress-gateway
#
# The base is the Python that CI tests with, pinned by digest. This command prints the current digest:
#
#     docker buildx imagetools inspect python:3.11-slim-bookworm --format '{{.Manifest.Digest}}'
ARG BASE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS build
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# Two environments: one with the build tools, and one without pip, which is copied into the final image. The lock
# files are copied before the code, so that a change of code downloads nothing.
COPY requirements-image.lock requirements-package.lock ./
RUN python -m venv tools \
 && tools/bin/pip install --require-hashes --only-binary :all: -r requirements-package.lock \
 && python -m venv --without-pip /opt/gateway \
 && tools/bin/pip --python /opt/gateway/bin/python install \
      --require-hashes --only-binary :all: -r requirements-image.lock

COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
RUN tools/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir dist . \
 && tools/bin/pip --python /opt/gateway/bin/python install --no-index --no-deps dist/*.whl

FROM ${BASE}
ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sd-progress-gateway" \
      org.opencontainers.image.description="Signs, coalesces, caches and measures image-generation progress queries." \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"

COPY --from=build /opt/gateway /opt/gateway

# Nothing is written at run time: pip compiled the bytecode at installation. A container decides which ports it
# publishes, so the gateway listens on all addresses.
ENV PATH=/opt/gateway/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SD_GATEWAY_SERVER__HOST=0.0.0.0

# Settings are read from config/gateway.toml in this directory, if a file is mounted there.
WORKDIR /etc/sd-gateway
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
  CMD ["/opt/gateway/bin/python", "-m", "gateway.cli.health_check"]
ENTRYPOINT ["/opt/gateway/bin/sd-gateway"]
CMD ["serve"]
