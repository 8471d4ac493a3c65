"""What runs per kick or per packet, in C, and its cffi binding (`datapath.native._native`)."""
