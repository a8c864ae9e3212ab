"""What a finished run leaves in its folder: metrics, summary, figures, exported weights."""
