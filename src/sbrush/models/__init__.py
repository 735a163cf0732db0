"""Teachers and students as networks: loaded, adapted to what core.py expects, given LoRAs, merged, exported."""
