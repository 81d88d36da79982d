"""The ten-minute path: a real model, S3 server, MLflow and Airflow on this machine."""
