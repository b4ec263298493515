"""The refund ledger and the protocol that sends a refund once. No Airflow."""
