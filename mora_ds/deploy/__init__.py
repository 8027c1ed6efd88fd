"""An adapter outside its run: merged models, portable adapters, many adapters over one base."""
