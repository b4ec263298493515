"""Airflow provider package for Payroc: the connection type, the hook and what stands on it."""
