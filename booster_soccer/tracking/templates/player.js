// Plays episodes from above. An episode's path has rows [time s, robot x, y, ball x, y, z m].
function play(player) {
  const episodes = JSON.parse(player.querySelector(".data").textContent);
  const canvas = player.querySelector("canvas"), pen = canvas.getContext("2d");
  const slider = player.querySelector("input"), clock = player.querySelector(".time"), button = player.querySelector(".play");
  const list = player.querySelector(".list table");
  let episode = null, seconds = 0, playing = false, last = null, view = null;

  const head = list.insertRow();
  for (const name of ["task", "score", "ending", "s"]) head.appendChild(document.createElement("th")).textContent = name;
  const rows = episodes.map((one) => {
    const row = list.insertRow();
    const end = one.path[one.path.length - 1][0];
    for (const text of [one.task, one.score.toFixed(2), one.ending, end.toFixed(1)]) row.insertCell().textContent = text;
    row.title = "seed " + one.seed;
    row.onclick = () => { choose(one); start(); };
    return row;
  });

  function choose(one) {
    episode = one;
    rows.forEach((row, i) => row.classList.toggle("chosen", episodes[i] === one));
    const xs = [one.aim_pos_w[0]], ys = [one.aim_pos_w[1]];
    for (const [, x, y, bx, by] of one.path) { xs.push(x, bx); ys.push(y, by); }
    if (one.task !== "target") { xs.push(-FIELD.half_length - FIELD.goal_depth); ys.push(-FIELD.goal_half_width, FIELD.goal_half_width); }
    const low = [Math.min(...xs) - 0.8, Math.min(...ys) - 0.8], high = [Math.max(...xs) + 0.8, Math.max(...ys) + 0.8];
    const scale = Math.min(canvas.width / (high[0] - low[0]), canvas.height / (high[1] - low[1]));
    const middle = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2];
    view = { scale, x: (x) => canvas.width / 2 + (x - middle[0]) * scale, y: (y) => canvas.height / 2 - (y - middle[1]) * scale };
    show(0);
  }

  function at(time) {
    const path = episode.path;
    let i = 0;
    while (i < path.length - 2 && path[i + 1][0] <= time) i++;
    const [before, after] = [path[i], path[Math.min(i + 1, path.length - 1)]];
    const span = after[0] - before[0], share = span > 0 ? Math.min((time - before[0]) / span, 1) : 1;
    return before.map((value, column) => value + share * (after[column] - value));
  }

  function line(points, colour, width, dash = []) {
    pen.beginPath();
    points.forEach(([x, y], i) => i ? pen.lineTo(view.x(x), view.y(y)) : pen.moveTo(view.x(x), view.y(y)));
    pen.strokeStyle = colour; pen.lineWidth = width; pen.setLineDash(dash); pen.stroke(); pen.setLineDash([]);
  }

  function disc(x, y, radius, colour, filled = true) {
    pen.beginPath(); pen.arc(view.x(x), view.y(y), Math.max(radius * view.scale, 3), 0, 2 * Math.PI);
    if (filled) { pen.fillStyle = colour; pen.fill(); } else { pen.strokeStyle = colour; pen.lineWidth = 2; pen.stroke(); }
  }

  function show(time) {
    const end = episode.path[episode.path.length - 1][0], f = FIELD;
    seconds = Math.min(time, end);
    const [, x, y, ballX, ballY, ballZ] = at(seconds);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const [l, w] = [f.half_length, f.half_width];
    line([[-l, -w], [l, -w], [l, w], [-l, w], [-l, -w]], "#888", 2);
    line([[0, -w], [0, w]], "#bbb", 1);
    for (const side of [-1, 1]) {
      const back = side * (l + f.goal_depth), g = f.goal_half_width;
      line([[side * l, -g], [back, -g], [back, g], [side * l, g]], "#555", 2);
    }
    const [aimX, aimY] = episode.aim_pos_w;
    if (episode.task === "goalie") {
      const keeper = f.keeper_amplitude * Math.sin(2 * Math.PI * f.keeper_frequency_hz * seconds);
      line([[-l, keeper - f.keeper_half_width], [-l, keeper + f.keeper_half_width]], "#666", 9);
    } else {
      disc(aimX, aimY, episode.task === "target" ? f.target_radius : f.window_radius, "#222", false);
    }
    if (episode.task === "obstacle") {
      // Three defenders and the window share the slots.
      const free = f.defender_slots_y.reduce((a, b) => Math.abs(b - aimY) < Math.abs(a - aimY) ? b : a);
      for (const slot of f.defender_slots_y) {
        if (slot !== free) line([[-l, slot - f.defender_half_width], [-l, slot + f.defender_half_width]], "#666", 9);
      }
    }
    const past = episode.path.filter((row) => row[0] <= seconds);
    line([...past.map((row) => [row[1], row[2]]), [x, y]], "#1f3f7f", 2.5);
    line([...past.map((row) => [row[3], row[4]]), [ballX, ballY]], "#cf5f12", 2.5, [7, 5]);
    pen.fillStyle = "#1f3f7f";
    pen.fillRect(view.x(x) - 0.18 * view.scale, view.y(y) - 0.18 * view.scale, 0.36 * view.scale, 0.36 * view.scale);
    disc(ballX, ballY, f.ball_radius * (1 + Math.max(ballZ - f.ball_radius, 0)), "#cf5f12");
    slider.value = 1000 * seconds / end;
    clock.textContent = `${seconds.toFixed(2)} s of ${end.toFixed(2)}, ${episode.task}, seed ${episode.seed}: ` +
      `${episode.score.toFixed(2)}, ${episode.ending}`;
    if (seconds >= end) stop();
  }

  function step(now) {
    if (!playing) return;
    if (last !== null) show(seconds + (now - last) / 1000);
    last = now;
    if (playing) requestAnimationFrame(step);
  }

  function start() {
    const end = episode.path[episode.path.length - 1][0];
    if (seconds >= end) show(0);
    playing = true; last = null; button.textContent = "pause";
    requestAnimationFrame(step);
  }

  function stop() { playing = false; button.textContent = "play"; }

  button.onclick = () => playing ? stop() : start();
  slider.oninput = () => { stop(); show(slider.value / 1000 * episode.path[episode.path.length - 1][0]); };
  choose(episodes[0]);
}
