"""Benchmarks: one loop over operators, backends, cases and baselines, one report.

python -m benchmarks            every case (see --help; --quick takes less than a minute)
python -m benchmarks --goals    the rows that have a goal, and whether it is met
python -m benchmarks compare OLD.json NEW.json
pytest benchmarks --benchmark-only
"""
