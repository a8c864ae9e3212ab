"""How a step is computed: settings that change time and memory, never results."""
