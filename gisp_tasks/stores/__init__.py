"""Where artefacts and versions live: S3 or a directory, MLflow, the manifest."""
