"""The module that is submitted: preprocessed observation in, unit torque out, our 50 Hz control inside.

The platform calls the model before every 500 Hz physics step, hands it the preprocessed observation
(B, 87) and rescales its output from [-1, 1] to the torque limits. Our policy acts at 50 Hz and its joint
target is held for ten physics steps, so the module keeps a target and an age for each lane. Nobody tells
it that an episode starts; it sees it: at reset all 12 joint velocities are exactly 0.0, after one physics
step they no longer are. A batch of another size starts afresh.

Arithmetic: the observation, the action, the torque law of `envs/pd.py` and the output are float32; the
actor between observation and action is float64, its action rounded once. A float32 matrix product has
other last digits in every library, on every processor and at every batch size, and contacts are chaotic:
a tenth digit can decide an episode. Rounded from float64 the action is the same everywhere (NumPy gives
the same torque, bit for bit), but for the rare number that lies within 1e-16 of a rounding boundary.

No gradient is recorded: the platform calls models with autograd on, and a state inside the graph would
keep a whole episode alive. The lanes' state is neither parameter nor buffer, and nothing is written in place: so a
module that has played saves and loads like a new one, and it does not matter in which mode (`inference_mode`,
`no_grad`, none) or thread a tensor was born.
"""

import copy

import numpy as np
import torch
from torch import nn

from booster_soccer.agents.ddpg import Actor
from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import SLICES


def _float32(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


class SubmissionModel(nn.Module):
    """Observation (B, 87) float32 to unit torque (B, 12) in [-1, 1]: torque divided by the joint's limit.

    With `hold` (as trained) a joint target lasts ten calls; without, the module is stateless and asks the
    actor at every call, which trained policies are not used to.
    """

    def __init__(self, actor: Actor, hold: bool = True):
        super().__init__()
        self.actor = copy.deepcopy(actor).double()
        self.hold = hold
        self.calls_per_action = c.PHYSICS_STEPS_PER_ACTION
        self.joint_pos_start, self.joint_pos_stop = SLICES["joint_pos"].start, SLICES["joint_pos"].stop
        self.joint_vel_start, self.joint_vel_stop = SLICES["joint_vel"].start, SLICES["joint_vel"].stop
        self.register_buffer("default_pose_rad", _float32(c.DEFAULT_POSE_RAD))
        self.register_buffer("action_scale_rad", _float32(c.ACTION_SCALE_RAD))
        self.register_buffer("kp_nm_per_rad", _float32(c.KP_NM_PER_RAD))
        self.register_buffer("kd_nms_per_rad", _float32(c.KD_NMS_PER_RAD))
        self.register_buffer("torque_limit_nm", _float32(c.TORQUE_LIMIT_NM))
        # Per lane: the held joint target, and how many calls it has served (0: a new one is due). Plain attributes.
        self.target_rad = torch.zeros(0, c.NUM_JOINTS, dtype=torch.float32, device="cpu")
        self.age = torch.zeros(0, dtype=torch.int64, device="cpu")

    def joint_target_rad(self, obs: torch.Tensor) -> torch.Tensor:
        """The actor's joint target (12,) for one lane's observation (87,)."""
        action = self.actor(obs.double().unsqueeze(0)).squeeze(0).float()
        return self.default_pose_rad + action * self.action_scale_rad

    def held_targets_rad(self, obs: torch.Tensor, joint_vel_rad_s: torch.Tensor) -> torch.Tensor:
        """Joint targets (B, 12), renewed in the lanes where the old one has served its time."""
        batch = obs.shape[0]
        held_rad, age = self.target_rad.to(obs.device), self.age.to(obs.device)
        if age.shape[0] != batch:
            held_rad = torch.zeros(batch, joint_vel_rad_s.shape[1], dtype=torch.float32, device=obs.device)
            age = torch.zeros(batch, dtype=torch.int64, device=obs.device)
        renew = torch.logical_or(torch.all(joint_vel_rad_s == 0.0, dim=1), age == 0)
        lanes = [held_rad[:0]]
        for lane in range(batch):
            target_rad = self.joint_target_rad(obs[lane]) if bool(renew[lane]) else held_rad[lane]
            lanes.append(target_rad.unsqueeze(0))
        self.target_rad = torch.cat(lanes)
        self.age = (torch.where(renew, torch.zeros_like(age), age) + 1) % self.calls_per_action
        return self.target_rad

    def fresh_targets_rad(self, obs: torch.Tensor) -> torch.Tensor:
        """Joint targets (B, 12) of this very step."""
        lanes = [torch.zeros(0, self.default_pose_rad.shape[0], dtype=torch.float32, device=obs.device)]
        for lane in range(obs.shape[0]):
            lanes.append(self.joint_target_rad(obs[lane]).unsqueeze(0))
        return torch.cat(lanes)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            obs = obs.to(torch.float32)
            joint_pos_rad = obs[:, self.joint_pos_start : self.joint_pos_stop]
            joint_vel_rad_s = obs[:, self.joint_vel_start : self.joint_vel_stop]
            if self.hold:
                target_rad = self.held_targets_rad(obs, joint_vel_rad_s)
            else:
                target_rad = self.fresh_targets_rad(obs)
            spring_nm = self.kp_nm_per_rad * (target_rad - joint_pos_rad)
            torque_nm = spring_nm - self.kd_nms_per_rad * joint_vel_rad_s
            return torch.clamp(torque_nm / self.torque_limit_nm, -1.0, 1.0)


def scripted(actor: Actor, hold: bool = True) -> torch.jit.ScriptModule:
    """The TorchScript module of an actor; the platform's SDK saves a `ScriptModule` as it is.

    Tracing, which the SDK does to any other module, would freeze the hold into one fixed branch.
    """
    return torch.jit.script(SubmissionModel(actor, hold).requires_grad_(False).eval())
