"""Benchmarks; see README.md."""

import os

# Workers of the tests are forks of one process that has imported everything: slower than those of users.
os.environ.setdefault("ORGWORKER_TEST_PLAIN", "1")
