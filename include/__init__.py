"""Code that knows Payroc and the refund ledger, and nothing of Airflow."""
