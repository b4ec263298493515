"""`make demo` and `make up`: the whole project on one machine, with its own Postgres and a local Payroc."""
