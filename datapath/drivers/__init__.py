"""vDPA drivers, one module (or package) each: they make a `datapath.vdpa.VdpaDevice` out of a VF."""
