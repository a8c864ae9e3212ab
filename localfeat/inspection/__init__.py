"""What a trained network knows at which depth: probes, neighbours and similarities of its blocks' features."""
