// Text: type, watch it write.
export function start(model, $, settings) {
  $("main").innerHTML = `
    <textarea id="prompt" rows="3" spellcheck="false" aria-label="prompt"></textarea>
    <div class="row">
      <button id="go">Write</button>
      <label>temperature <input id="temperature" type="range" min="0" max="1.5" step="0.05" value="0.7"><output></output></label>
      <label>top-p <input id="top-p" type="range" min="0.1" max="1" step="0.05" value="0.95"><output></output></label>
      <span id="speed" class="figure"></span>
    </div>
    <pre id="paper" aria-live="polite"></pre>`;
  $("#prompt").value = settings.prompt;
  let running = false, written = 0, busy = 0;
  const stop = () => { running = false; $("#go").textContent = "Write"; };
  function turn() {
    if (!running) return;
    const begin = performance.now();
    let piece = "";
    // As much as fits into a third of a picture's time: the page stays smooth, and the speed is that of the model.
    while (performance.now() - begin < 5 && written + piece.length < 20000) {
      piece += model.write(8, +$("#temperature").value, +$("#top-p").value);
      written += 8;
    }
    busy += performance.now() - begin;
    $("#paper").append(piece);
    $("#paper").scrollTop = $("#paper").scrollHeight;
    $("#speed").textContent = `${Math.round(written / busy * 1000).toLocaleString("en")} characters per second`;
    if (written >= 20000) stop();
    else setTimeout(() => requestAnimationFrame(turn), 60);
  }
  $("#go").onclick = () => {
    if (running) return stop();
    model.reset();
    const prompt = $("#prompt").value || settings.prompt;
    const unknown = model.read(prompt);
    $("#paper").innerHTML = "<b></b>";
    $("#paper b").textContent = prompt;
    $("#note").textContent = unknown.length ? `The model has never seen ${unknown.join(" ")}: left out.` : "";
    written = 0, busy = 0, running = true;
    $("#go").textContent = "Stop";
    turn();
  };
}
