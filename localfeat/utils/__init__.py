"""What every room uses: errors, files written whole, locks, text in messages."""
