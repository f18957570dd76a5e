"""The heart: buffers, keys, the step, the rolling store, shadow capture, the dispatcher, the device-side loop."""
