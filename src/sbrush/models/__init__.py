"""Teachers and students as networks: loaded, adapted to core's one signature, given LoRAs, merged, exported."""
