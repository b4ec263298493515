"""
A local Payroc for the demo and the tests: identity, bank transfer refunds and closing of batches, with failures on demand.

It shares no code with the client side, so that one mistake cannot hide in both. ``python -m include.sandbox --help`` runs it;
README.md lists what it decides where Payroc's documentation is silent.
"""
