"""Documents of text, images and speech: how they are read, encoded, stored and shown. Read docs/interleaved.md first."""
