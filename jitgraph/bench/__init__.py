"""The benchmark of the five cases: fresh processes, raw samples, and tables computed from the raw samples alone."""
