"""
A deterministic simulation of everything that can happen to a refund.

The production code of ``include/refunds`` runs unchanged, driven by hand instead of by an event loop: each of its awaits is a point at
which the simulation may let the worker die, freeze or fail, or let another worker in. Clock, Payroc, the merchant's table and (for
speed) the ledger are simulated; everything is drawn from one seed, so a history that breaks an invariant can be told step by step.

=================  ===================================================================================
``engine``         the clock, the actors, and what may happen to them at each point
``ledger``         a ledger in memory that honours the constraints of the one in Postgres
``twins``          the real ledger behind the same calls, alone or beside the one in memory
``payroc``         Payroc, as its reference says and as badly as it does not exclude
``merchant``       the source table and the people who edit it
``airflow``        runs, tasks, retries, clears and marks, as Airflow delivers them: at least once
``invariants``     what must be true at each moment and at the end
``history``        one seed: a world, what happens in it, and its end
``mutants``        the protocol with one thing broken, to prove that the simulation would notice
=================  ===================================================================================
"""
