"""Where the memory of a training step goes: accounting by storage, planning and measurement."""
