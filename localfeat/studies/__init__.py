"""Many runs: sweeps of a study's jobs, reports on them, probes of what their modules learned."""
