"""Write a scan of a brain and its tissues as an OME-Zarr image with labels. Run: python data.py

Needs the maps that nilearn ships: pip install --no-deps nilearn; pip install nibabel
The brain is the MNI152 template, an average of 152 scans. One scan is worse, so that noise and uneven brightness are
added, as much as in the worst of BrainWeb's simulated scans (Cocosco et al. 1997): 9 % and 40 %.

The template is free to use and to distribute with this notice: Copyright (C) 1993-2009 Louis Collins, McConnell Brain
Imaging Centre, Montreal Neurological Institute, McGill University (ICBM 2009a nonlinear symmetric; Fonov et al. 2009).
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import zarr

AXES = [{"name": "t", "type": "time"}, *({"name": name, "type": "space", "unit": "millimeter"} for name in "zyx")]
CHUNK = (1, 32, 32, 32)
COLOURS = {0: (0, 0, 0, 0), 1: (128, 128, 128, 255), 2: (255, 255, 255, 255)}  # background, grey and white matter


def read(name):
    """Return a map of nilearn as uint8[t, z, y, x] of one time; a voxel is a cubic millimetre."""
    import nibabel

    package = find_spec("nilearn")  # found, not imported: its dependencies are not needed
    if package is None:
        raise SystemExit("nilearn holds the data: pip install --no-deps nilearn")
    folder = Path(package.origin).parent / "datasets" / "data"
    return np.asarray(nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz").dataobj).T[None]


def tissues(grey, white):
    """Return the likeliest of background, grey and white matter at each voxel, from maps of 255 times a probability."""
    background = 255 - np.minimum(255, grey.astype("int16") + white)
    return np.stack([background, grey, white]).argmax(0).astype("uint8")


def scanned(template, noise=0.09, unevenness=0.4, seed=0):
    """Return a scan of a template: brightness falls smoothly by up to 40 % along the head, and noise is Rician."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in template.shape[1:]), indexing="ij")
    field = np.sin(2 * z + 0.5) * np.cos(1.5 * y - 0.4) + 0.6 * np.sin(2 * x - 0.8)
    low, high = field[template[0] > 0].min(), field[template[0] > 0].max()
    signal = template * (1 - unevenness * (field - low).clip(0) / (high - low))
    real, imaginary = (
        noise * np.percentile(template, 99) * np.random.default_rng(seed).normal(size=(2, *template.shape))
    )
    return np.hypot(signal + real, imaginary).round().clip(0, 255).astype("uint8")


def write_image(group, values, **attributes):
    """Write an image of one resolution (OME-Zarr 0.5)."""
    group.create_array("0", data=values, chunks=CHUNK, dimension_names="tzyx", fill_value=0)
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0, 1.0]}]
    levels = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": AXES, "datasets": levels}], **attributes}


def main(directory):
    """Write brain.zarr: level 0, and labels/tissue/0 beside it."""
    scan, labels = scanned(read("t1")), tissues(read("gm"), read("wm"))
    with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is data, not a missing chunk
        image = zarr.create_group(Path(directory, "brain.zarr"), overwrite=True)
        write_image(image, scan)
        names = image.create_group("labels")
        names.attrs["ome"] = {"version": "0.5", "labels": ["tissue"]}
        label = {"colors": [{"label-value": value, "rgba": list(rgba)} for value, rgba in COLOURS.items()]}
        write_image(names.create_group("tissue"), labels, **{"image-label": label})
    shares = ", ".join(f"{share:.1%}" for share in np.bincount(labels.ravel()) / labels.size)
    print(f"brain.zarr: {scan.shape} voxels; background, grey and white matter: {shares}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
