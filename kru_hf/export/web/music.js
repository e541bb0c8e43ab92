// Music: compose, see the roll, hear it, take it along as MIDI. A frame is 88 keys from A0 up.
const LOWEST = 21;

// Notes of a roll (frames of 88): [first frame, length, pitch]; a key that sounds on is held.
export function notes(roll) {
  const found = [];
  for (let key = 0; key < 88; key++)
    for (let t = 0; t < roll.length; t++)
      if (roll[t][key] && !(t && roll[t - 1][key])) {
        let n = 1;
        while (t + n < roll.length && roll[t + n][key]) n++;
        found.push([t, n, LOWEST + key]);
      }
  return found.sort((a, b) => a[0] - b[0]);
}

// A MIDI file of one track: events are a time since the one before (in 96ths of a frame) and bytes.
export function midi(roll, framesPerQuarter, tempo) {
  const events = notes(roll).flatMap(([t, n, pitch]) => [[96 * t, 0x90, pitch, 80], [96 * (t + n), 0x80, pitch, 0]]);
  events.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const number = (n) => n < 128 ? [n] : n < 16384 ? [128 | n >> 7, n & 127] : [128 | n >> 14, 128 | n >> 7 & 127, n & 127];
  const word = (n) => [n >>> 24, n >> 16 & 255, n >> 8 & 255, n & 255];
  const us = Math.round(6e7 / tempo);
  const track = [0, 0xff, 0x51, 3, us >> 16, us >> 8 & 255, us & 255];
  let now = 0;
  for (const [time, ...bytes] of events) {
    track.push(...number(time - now), ...bytes);
    now = time;
  }
  track.push(0, 0xff, 0x2f, 0);
  const ticks = 96 * framesPerQuarter;
  return Uint8Array.from([
    ...[..."MThd"].map((c) => c.charCodeAt()), 0, 0, 0, 6, 0, 0, 0, 1, ticks >> 8, ticks & 255,
    ...[..."MTrk"].map((c) => c.charCodeAt()), ...word(track.length), ...track,
  ]);
}

export function start(model, $, settings) {
  $("main").innerHTML = `
    <div class="row">
      <button id="go">Compose</button> <button id="play" disabled>Play</button>
      <a id="save" class="button" hidden download="kru.mid">MIDI</a>
      <label>temperature <input id="temperature" type="range" min="0.3" max="1.5" step="0.05" value="1"><output></output></label>
      <label>tempo <input id="tempo" type="range" min="40" max="180" step="2" value="84"><output></output></label>
      <span id="speed" class="figure"></span>
    </div>
    <canvas id="roll" width="1200" height="440" aria-label="piano roll"></canvas>`;
  const canvas = $("#roll"), pen = canvas.getContext("2d");
  const frames = 64 * settings.framesPerQuarter / Math.max(1, settings.framesPerQuarter / 2);
  let roll = [], sound = null;
  function draw(at = -1) {
    const style = getComputedStyle(document.body), keys = 40, w = (canvas.width - keys) / frames, low = 15, high = 75;
    const h = canvas.height / (high - low);
    pen.fillStyle = style.getPropertyValue("--paper");
    pen.fillRect(0, 0, canvas.width, canvas.height);
    for (let key = low; key < high; key++) {
      const black = [1, 3, 6, 8, 10].includes((key + LOWEST) % 12), y = canvas.height - (key - low + 1) * h;
      pen.fillStyle = black ? "#333" : "#fff";
      pen.fillRect(0, y, keys - 6, h - 1);
      if (black) { pen.fillStyle = "rgba(127,127,127,.12)"; pen.fillRect(keys, y, canvas.width, h); }
      if ((key + LOWEST) % 12 === 0) {
        pen.fillStyle = "#777"; pen.font = `${h + 3}px sans-serif`;
        pen.fillText(`C${(key + LOWEST) / 12 - 1}`, 3, y + h - 1);
      }
    }
    for (let bar = 0; bar < frames; bar += 4 * settings.framesPerQuarter) {
      pen.fillStyle = "rgba(127,127,127,.4)"; pen.fillRect(keys + bar * w, 0, 1, canvas.height);
    }
    // One colour per voice: notes that sound together are told apart from high to low.
    for (const [t, n, pitch] of notes(roll)) {
      const above = roll[t].slice(pitch - LOWEST + 1).reduce((sum, x) => sum + x, 0);
      pen.fillStyle = ["#2f7ed8", "#d9822b", "#3a9a5b", "#b0417a", "#7a5cc7"][Math.min(above, 4)];
      pen.fillRect(keys + t * w + 1, canvas.height - (pitch - LOWEST - low + 1) * h, n * w - 2, h - 1);
    }
    if (at >= 0) { pen.fillStyle = "#c33"; pen.fillRect(keys + at * w, 0, 2, canvas.height); }
  }
  function silence() {
    sound?.close();
    sound = null;
    $("#play").textContent = "Play";
  }
  function play() {
    if (sound) return silence();
    const seconds = 60 / +$("#tempo").value / settings.framesPerQuarter;
    sound = new AudioContext();
    const begin = sound.currentTime + 0.1, out = sound.createGain(), mine = sound;
    out.gain.value = 0.12;
    out.connect(sound.destination);
    for (const [t, n, pitch] of notes(roll)) {
      const tone = sound.createOscillator(), gain = sound.createGain(), on = begin + t * seconds, off = on + n * seconds;
      tone.setPeriodicWave(sound.createPeriodicWave(new Float32Array(7), new Float32Array([0, 1, .4, .24, .16, .12, .1])));
      tone.frequency.value = 440 * 2 ** ((pitch - 69) / 12);
      gain.gain.setValueAtTime(0, on);
      gain.gain.linearRampToValueAtTime(1, on + 0.01);
      gain.gain.exponentialRampToValueAtTime(0.15, off + 0.05);
      gain.gain.linearRampToValueAtTime(0, off + 0.3);
      tone.connect(gain).connect(out);
      tone.start(on);
      tone.stop(off + 0.35);
    }
    $("#play").textContent = "Stop";
    const follow = () => {
      if (sound !== mine) return draw();
      const at = (sound.currentTime - begin) / seconds;
      draw(at);
      if (at > roll.length + 1) return silence(), draw();
      requestAnimationFrame(follow);
    };
    follow();
  }
  $("#go").onclick = () => {
    silence();
    model.reset();
    model.frame(new Float32Array(88));
    roll = [];
    let busy = 0;
    const turn = () => {
      const begin = performance.now();
      for (let i = 0; i < 4 && roll.length < frames; i++) {
        const frame = model.draw(+$("#temperature").value, 1, settings.leastVoices, 12);
        model.frame(frame);
        roll.push(frame);
      }
      busy += performance.now() - begin;
      draw();
      $("#speed").textContent = `${Math.round(roll.length / busy * 1000).toLocaleString("en")} frames per second`;
      if (roll.length < frames) return requestAnimationFrame(turn);
      $("#play").disabled = false;
      $("#save").hidden = false;
      $("#save").href = URL.createObjectURL(
        new Blob([midi(roll, settings.framesPerQuarter, +$("#tempo").value)], { type: "audio/midi" }));
    };
    turn();
  };
  $("#play").onclick = play;
  draw();
}
