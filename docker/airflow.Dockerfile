# API server, scheduler, DAG processor, triggerer and the MLflow server: nothing here loads a model, so there is no torch.
# Callbacks of tasks whose worker died run in the DAG processor; what they import is here.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/venv
COPY docker/airflow.lock docker/services.lock ./
# The locks are complete, so --no-deps: what they do not name does not get in.
RUN /opt/venv/bin/pip install --no-deps -r airflow.lock -r services.lock && /opt/venv/bin/pip check
COPY pyproject.toml README.md ./
COPY gisp_tasks gisp_tasks
COPY dags dags
RUN /opt/venv/bin/pip install --no-deps .

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    AIRFLOW_HOME=/opt/airflow
RUN useradd --uid 50000 --gid 0 --home-dir /home/airflow --create-home airflow \
    && mkdir -p /opt/airflow/logs /home/airflow/.mlflow /cache \
    && chown -R 50000:0 /opt/airflow /home/airflow /cache \
    && chmod -R g=u /opt/airflow /home/airflow /cache
COPY --from=build /opt/venv /opt/venv
COPY --chmod=755 docker/entrypoint docker/healthy docker/init-airflow /usr/local/bin/
COPY docker/init_services.py /opt/airflow/
COPY dags /opt/airflow/dags
USER 50000:0
WORKDIR /opt/airflow
ENTRYPOINT ["entrypoint"]
CMD ["airflow", "version"]
