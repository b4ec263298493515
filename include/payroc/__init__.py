"""Payroc's API as data: models, problem types and errors. No Airflow, no I/O."""
