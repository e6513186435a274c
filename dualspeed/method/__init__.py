"""DualSpeed: a stock VLM with fast and slow mode."""
