"""What models of text, images and speech share: routed layers, image stems, losses; a family brings its backbone."""
