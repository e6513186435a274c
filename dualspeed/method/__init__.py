"""DualSpeed's method: a stock VLM with fast and slow mode."""
