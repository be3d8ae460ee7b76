"""The daemon: engines, control interface and configuration."""
