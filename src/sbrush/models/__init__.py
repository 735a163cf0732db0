"""Teachers and students as networks: read, adapted to core's one signature, given LoRAs, written."""
