"""A compiled MuJoCo model in a browser, drawn there by viser: no OpenGL, no screen, no GPU on this machine.

    viewer = Viewer(port=8080)
    viewer.set_model(model)     # shapes and colours; again when another is played
    viewer.show(qpos)           # where everything is now

Needs the extra `viewer`. What it adds to viser is the reading of a MuJoCo model: which geoms are seen, in what colour.
"""

import contextlib
import socket
from typing import Any

import mujoco
import numpy as np

from booster_soccer.errors import UserError

_SHOWN_GROUPS = (0, 1, 2)  # as MuJoCo's own viewer does
_DEFAULT_RGBA = (0.5, 0.5, 0.5, 1.0)  # of a geom; its material's colour counts then
_GRAIN_M = 0.01  # of meshes: 216,000 faces become 38,000
_MOVED = 1e-5  # a body that moved or turned less is not sent again


class Viewer:
    """A web server, and the scene that it shows."""

    def __init__(self, port: int, host: str = "127.0.0.1"):
        """Serve at http://host:port or the next port; `UserError` where viser is missing or that is not our host."""
        try:
            import viser
        except ImportError as error:
            raise UserError(
                f"cannot import viser ({error}): install it with pip install -c constraints.txt -e '.[viewer]'"
            ) from error
        try:
            with socket.socket() as probe:
                probe.bind((host, 0))  # viser would look for a free port for ever
        except OSError as error:
            raise UserError(f"cannot serve at {host} ({error}): give --host an address of this machine") from error
        self.server: Any = viser.ViserServer(host=host, port=port, label="Booster T1 football", verbose=False)
        self.address = f"http://{host}:{self.server.get_port()}"
        self.server.scene.set_up_direction("+z")
        self._frames: dict[int, Any] = {}  # of the bodies that are not the world
        self._camera: tuple[np.ndarray, np.ndarray] | None = None
        self.server.on_client_connect(self._aim)

    def close(self) -> None:
        """End the server."""
        self.server.stop()

    def set_model(self, model: mujoco.MjModel) -> None:
        """Forget what is there and take up a model's geoms and sites."""
        self._model, self._data = model, mujoco.MjData(model)
        with self.server.atomic():
            self.server.scene.reset()
            self.server.scene.set_up_direction("+z")
            moving = range(1, model.nbody)
            self._frames = {i: self.server.scene.add_frame(f"/body{i}", show_axes=False) for i in moving}
            self._sent = np.full((model.nbody, 7), np.nan)
            for i in range(model.ngeom):
                self._add_geom(i)
            for i in range(model.nsite):
                self._add_site(i)

    def show(self, qpos: np.ndarray) -> None:
        """Move the bodies to where qpos (nq,) puts them."""
        self._data.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self._data)
        poses = np.concatenate([self._data.xpos, self._data.xquat], axis=1)
        with self.server.atomic():
            for i, frame in self._frames.items():
                if not np.abs(poses[i] - self._sent[i]).max() < _MOVED:  # NaN at first
                    frame.position, frame.wxyz = poses[i, :3], poses[i, 3:]
                    self._sent[i] = poses[i]

    def look(self, from_w: np.ndarray, at_w: np.ndarray) -> None:
        """Put the camera of everyone who looks, now and later, at a place (3,) in m, looking at another."""
        self._camera = from_w, at_w
        for client in self.server.get_clients().values():
            self._aim(client)

    def _aim(self, client: Any) -> None:
        if self._camera is not None:
            with contextlib.suppress(Exception):  # whoever has just gone needs no camera
                client.camera.position, client.camera.look_at = self._camera

    # --- shapes ---------------------------------------------------------------------------------------------

    def _place(self, kind: str, i: int) -> dict[str, Any]:
        model = self._model
        pose = {"position": getattr(model, f"{kind}_pos")[i], "wxyz": getattr(model, f"{kind}_quat")[i]}
        return {"name": f"/body{getattr(model, f'{kind}_bodyid')[i]}/{kind}{i}"} | pose

    def _add_geom(self, i: int) -> None:
        model, shape = self._model, mujoco.mjtGeom
        rgba, size, kind = geom_rgba(model, i), model.geom_size[i], model.geom_type[i]
        is_picture = kind == shape.mjGEOM_PLANE and _texture_of(model, i) >= 0  # logos, and the plane under the pitch
        if model.geom_group[i] not in _SHOWN_GROUPS or rgba[3] == 0.0 or is_picture:
            return
        add, look = self.server.scene, _look(rgba)
        place = self._place("geom", i)
        if kind == shape.mjGEOM_MESH:
            vertices, faces = coarse_mesh(model, model.geom_dataid[i])
            add.add_mesh_simple(vertices=vertices, faces=faces, side="double", flat_shading=True, **look, **place)
        elif kind == shape.mjGEOM_PLANE:
            add.add_box(dimensions=(2 * size[0], 2 * size[1], 0.002), **look, **place)
        elif kind == shape.mjGEOM_BOX:
            add.add_box(dimensions=2 * size, **look, **place)
        elif kind == shape.mjGEOM_CYLINDER:
            add.add_cylinder(radius=size[0], height=2 * size[1], **look, **place)
        elif kind == shape.mjGEOM_SPHERE:  # with edges, so that one sees it roll
            add.add_icosphere(radius=size[0], subdivisions=1, flat_shading=True, **look, **place)

    def _add_site(self, i: int) -> None:
        model, shape = self._model, mujoco.mjtGeom
        if model.site_group[i] not in _SHOWN_GROUPS:
            return
        size, look, place = model.site_size[i], _look(model.site_rgba[i]), self._place("site", i)
        if model.site_type[i] == shape.mjGEOM_CYLINDER:
            self.server.scene.add_cylinder(radius=size[0], height=2 * size[1], **look, **place)
        elif model.site_type[i] == shape.mjGEOM_BOX:
            self.server.scene.add_box(dimensions=2 * size, **look, **place)


def coarse_mesh(model: mujoco.MjModel, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) in m and faces (F, 3) of a mesh, with all that lies within a centimetre made one.

    A browser that draws without a GPU is slow with the 216,000 faces of the official model.
    """
    import trimesh

    mesh = model.mesh(i)
    vertices = model.mesh_vert[mesh.vertadr[0] : mesh.vertadr[0] + mesh.vertnum[0]]
    faces = model.mesh_face[mesh.faceadr[0] : mesh.faceadr[0] + mesh.facenum[0]]
    coarse = trimesh.Trimesh(np.round(vertices / _GRAIN_M), faces, process=False)
    coarse.merge_vertices(digits_vertex=0)
    coarse.update_faces(coarse.nondegenerate_faces() & coarse.unique_faces())
    coarse.remove_unreferenced_vertices()
    return np.asarray(coarse.vertices) * _GRAIN_M, np.asarray(coarse.faces)


def geom_rgba(model: mujoco.MjModel, i: int) -> np.ndarray:
    """Colour (4,) of a geom as MuJoCo shows it, a texture as its mean."""
    material, rgba = model.geom_matid[i], model.geom_rgba[i].astype(float)
    if material < 0 or tuple(rgba) != _DEFAULT_RGBA:
        return rgba
    rgba = model.mat_rgba[material].astype(float)
    texture = _texture_of(model, i)
    if texture >= 0:
        first, channels = model.tex_adr[texture], model.tex_nchannel[texture]
        size = model.tex_width[texture] * model.tex_height[texture] * channels
        pixels = model.tex_data[first : first + size].reshape(-1, channels)
        rgba[:3] *= pixels[:, :3].mean(axis=0) / 255.0
    return rgba


def _texture_of(model: mujoco.MjModel, i: int) -> int:
    material = model.geom_matid[i]
    return -1 if material < 0 else int(model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB])


def _look(rgba: np.ndarray) -> dict[str, Any]:
    red, green, blue = (round(255 * float(value)) for value in rgba[:3])
    opacity = float(rgba[3]) if rgba[3] < 1.0 else None
    return {"color": (red, green, blue), "opacity": opacity, "cast_shadow": False, "receive_shadow": False}
