"""Where local modules run: schedules around the one training loop."""
