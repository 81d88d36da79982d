# Celery workers: everything a task needs, with the lock's torch. The default build is for NVIDIA GPUs: the wheel brings
# CUDA's libraries, the host brings the driver and the NVIDIA container toolkit. Without a GPU:
#   docker build -f docker/worker.Dockerfile --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/venv
COPY docker/worker.lock docker/services.lock ./
# Not --no-deps: the CUDA build of torch pins NVIDIA's packages itself.
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" /opt/venv/bin/pip install -r worker.lock -r services.lock
COPY pyproject.toml README.md ./
COPY gisp_tasks gisp_tasks
COPY dags dags
RUN /opt/venv/bin/pip install --no-deps . && /opt/venv/bin/pip check

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    AIRFLOW_HOME=/opt/airflow \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# The user and group of Airflow's own images and Helm chart; group 0 owns the home, so that any user of it may write.
RUN useradd --uid 50000 --gid 0 --home-dir /home/airflow --create-home airflow \
    && mkdir -p /opt/airflow/logs /home/airflow/.mlflow /cache \
    && chown -R 50000:0 /opt/airflow /home/airflow /cache \
    && chmod -R g=u /opt/airflow /home/airflow /cache
COPY --from=build /opt/venv /opt/venv
COPY --chmod=755 docker/entrypoint docker/healthy /usr/local/bin/
COPY dags /opt/airflow/dags
USER 50000:0
WORKDIR /opt/airflow
ENTRYPOINT ["entrypoint"]
CMD ["airflow", "celery", "worker"]
