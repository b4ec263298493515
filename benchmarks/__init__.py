"""What the project costs, measured beside what others would have written: `make bench`, `make bench-quick`."""
