-- MLflow's own: both keep an alembic_version.
CREATE DATABASE mlflow;
