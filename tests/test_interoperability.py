"""Outputs of CellVim can be read by the packages used for further analysis; each test runs the real package.

squidpy and spatialdata are not in the test environment: together they bring some fifty packages, and the squidpy of
Python 3.11 forbids the imagecodecs that we read TIFFs with. Their tests run where they are installed.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from profile_tables import make_profiles

import cellvim
from cellvim.embedding.ledger import Rows
from cellvim.embedding.output import PlateRows, write_embeddings


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """A store as `cellvim embed` writes it: 4 wells of 2 fields, 30 cells each; two wells differ from the others."""
    path = tmp_path_factory.mktemp("interoperability") / "embeddings.zarr"
    wells = [w for w in ("A01", "A02", "B01", "B02") for _ in range(2)]
    fields = pd.DataFrame({"Metadata_Plate": "P", "Metadata_Well": wells, "Metadata_Site": [1, 2] * 4})
    fields["Metadata_pert_type"] = ["negcon" if w.endswith("1") else "trt" for w in wells]
    fields["compound"] = ["DMSO" if w.endswith("1") else "aspirin" for w in wells]

    def rows(field: int) -> Rows:
        rng = np.random.default_rng(field)
        objects = pd.DataFrame({"Metadata_ObjectNumber": np.arange(1, 31), "area_um2": rng.uniform(50, 200, 30)})
        values = rng.normal(size=(30, 12)).astype(np.float32)
        values[:, 0] += 12 * wells[field].endswith("2")
        return Rows(values, objects, rng.uniform(0, 300, (30, 2)))

    plate = PlateRows(fields, dict.fromkeys(range(8), 30), rows)
    write_embeddings(path, [lambda: plate], 12, {"cellvim": {"unit": "cell"}}, format="zarr")
    return path


@pytest.mark.slow  # numba compiles; `cellvim demo`'s test has scanpy's neighbours and UMAP in the quick run
def test_scanpy_takes_embeddings_as_they_are(embeddings):
    import scanpy as sc

    adata = anndata.read_zarr(embeddings)
    sc.pp.pca(adata, n_comps=5)
    sc.pp.neighbors(adata, n_neighbors=10)
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, resolution=0.1)
    treated = (adata.obs["compound"] == "aspirin").to_numpy()
    clusters = adata.obs["leiden"].astype(str)
    assert not set(clusters[treated]) & set(clusters[~treated])  # 12 standard deviations apart: no cluster has both
    sc.get.obs_df(adata, ["emb_0000", "area_um2"])


@pytest.mark.slow
def test_scanpy_makes_the_map_that_is_drawn(embeddings):
    import scanpy as sc

    adata = anndata.read_zarr(embeddings)
    sc.pp.neighbors(adata, use_rep="X")
    sc.tl.umap(adata, random_state=0)
    axes = cellvim.pl.umap(adata, "compound")
    assert len(axes.collections[0].get_offsets()) == 240


def test_anndata_opens_it_backed(embeddings, tmp_path):
    anndata.read_zarr(embeddings).write_h5ad(tmp_path / "embeddings.h5ad")
    backed = anndata.read_h5ad(tmp_path / "embeddings.h5ad", backed="r")
    assert backed.isbacked
    part = backed[backed.obs["compound"] == "aspirin"].to_memory()
    assert part.shape == (120, 12)
    wells = cellvim.profile(backed, fit_on="all")
    np.testing.assert_array_equal(wells.X, cellvim.profile(embeddings, fit_on="all").X)


def test_pycytominer_works_on_the_table():
    import pycytominer

    adata = make_profiles()
    features = list(adata.var_names)
    table = cellvim.to_pycytominer(adata)
    metadata = [c for c in table if c not in features]
    normalized = pycytominer.normalize(
        table,
        features=features,
        meta_features=metadata,
        samples="Metadata_pert_type == 'negcon'",
        method="mad_robustize",
    )
    selected = pycytominer.feature_select(normalized, features=features, operation=["variance_threshold"])
    consensus = pycytominer.aggregate(
        selected, strata=["Metadata_Compound"], features=[f for f in features if f in selected], operation="median"
    )
    assert len(consensus) == adata.obs["Metadata_Compound"].nunique()
    back = cellvim.from_pycytominer(normalized, features=features)
    ours = cellvim.profile(adata, statistic=None, per="all")
    np.testing.assert_allclose(back.X, ours.layers["robustmad"], rtol=1e-4, atol=1e-5)
    assert back.obs_names.tolist() == adata.obs_names.tolist()


def test_copairs_works_on_the_table():
    from copairs import map as copairs_map

    adata = make_profiles(plate_effect=0)
    table = cellvim.to_pycytominer(adata)
    treated = table[table["Metadata_pert_type"] == "trt"].reset_index(drop=True)
    features = list(adata.var_names)
    precision = copairs_map.average_precision(
        treated.drop(columns=features),
        treated[features].to_numpy(),
        pos_sameby=["Metadata_moa"],
        pos_diffby=[],
        neg_sameby=[],
        neg_diffby=["Metadata_moa"],
        progress_bar=False,
    )
    assert precision["average_precision"].mean() > 0.8


def test_spatialdata_takes_the_table(embeddings):
    models = pytest.importorskip("spatialdata.models")
    spatialdata = pytest.importorskip("spatialdata")
    table = cellvim.to_spatialdata_table(anndata.read_zarr(embeddings))
    models.TableModel().validate(table)
    found = spatialdata.SpatialData(tables={"embeddings": table})
    assert found.tables["embeddings"].n_obs == 240


def test_squidpy_finds_neighbours_within_fields(embeddings):
    squidpy = pytest.importorskip("squidpy")
    table = cellvim.to_spatialdata_table(anndata.read_zarr(embeddings))
    squidpy.gr.spatial_neighbors(table, library_key="region", coord_type="generic", n_neighs=4)
    i, j = table.obsp["spatial_connectivities"].nonzero()
    region = table.obs["region"].to_numpy()
    assert len(i) >= 4 * 240
    assert (region[i] == region[j]).all()


def test_our_measures_of_batches_are_scibs():
    metrics = pytest.importorskip("scib_metrics")
    from scib_metrics.nearest_neighbors import NeighborsResults
    from scipy.spatial.distance import cdist

    from cellvim.evaluate.batch_effects import kbet_acceptance

    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 60)
    values = rng.normal(size=(120, 5)) + 0.5 * codes[:, None]
    distance = cdist(values, values)
    near = np.argsort(distance, axis=1)[:, 1:21]
    results = NeighborsResults(indices=near, distances=np.take_along_axis(distance, near, axis=1))
    acceptance, _, _ = metrics.kbet(results, codes, alpha=0.05)
    assert kbet_acceptance(values, codes, neighbours=20) == pytest.approx(float(acceptance), abs=0.02)
