// Digits: draw, and see the classes move while the model reads pixel after pixel.
export function start(model, $, settings) {
  const side = settings.side, scale = 10;
  $("main").innerHTML = `
    <div class="row"><button id="clear">Clear</button> <span>Draw a digit; it is read pixel by pixel, row by row.</span>
      <span id="speed" class="figure"></span></div>
    <div class="digits">
      <canvas id="pad" width="${side * scale}" height="${side * scale}" aria-label="drawing"></canvas>
      <canvas id="seen" width="${side * scale}" height="${side * scale}" aria-label="what the model reads"></canvas>
      <div id="classes"></div>
    </div>
    <p>It reads: <b id="answer"></b></p>`;
  $("#classes").innerHTML = Array.from({ length: model.outputs }, (_, i) => `<div><span>${i}</span><i></i></div>`).join("");
  const pad = $("#pad"), pen = pad.getContext("2d", { willReadFrequently: true }), bars = document.querySelectorAll("#classes i");
  let drawing = false, reading = 0;
  const clear = () => {
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, pad.width, pad.height);
    $("#answer").textContent = "";
    reading++;
  };
  // As MNIST's pictures were made: the drawing in a box of 20 of the 28 pixels, its mass in the middle.
  function pixels() {
    const { data, width, height } = pen.getImageData(0, 0, pad.width, pad.height);
    let left = width, right = 0, top = height, bottom = 0, mass = 0, mx = 0, my = 0;
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) {
        const ink = data[4 * (y * width + x)];
        if (ink < 32) continue;
        left = Math.min(left, x), right = Math.max(right, x), top = Math.min(top, y), bottom = Math.max(bottom, y);
        mass += ink, mx += ink * x, my += ink * y;
      }
    if (!mass) return null;
    const zoom = side * 20 / 28 / (Math.max(right - left, bottom - top) + 1), small = document.createElement("canvas");
    small.width = small.height = side;
    const brush = small.getContext("2d");
    brush.imageSmoothingQuality = "high";
    brush.fillRect(0, 0, side, side);
    brush.setTransform(zoom, 0, 0, zoom, side / 2 - zoom * mx / mass, side / 2 - zoom * my / mass);
    brush.drawImage(pad, 0, 0);
    const seen = brush.getImageData(0, 0, side, side).data;
    return Float32Array.from({ length: side * side }, (_, i) => seen[4 * i] / 255);
  }
  function read() {
    const values = pixels(), mine = ++reading, view = $("#seen").getContext("2d");
    if (!values) return;
    model.reset();
    let at = 0, busy = 0;
    const turn = () => {
      if (mine !== reading) return;
      const begin = performance.now();
      let logits;
      for (let i = 0; i < 2 * side && at < values.length; i++, at++) logits = model.frame([values[at]]);
      const most = Math.max(...logits), shares = Array.from(logits, (x) => Math.exp(x - most));
      busy += performance.now() - begin;
      const total = shares.reduce((a, b) => a + b);
      shares.forEach((share, i) => { bars[i].style.width = `${100 * share / total}%`; });
      values.forEach((value, i) => {
        const grey = Math.round(255 * value);
        view.fillStyle = i < at ? `rgb(${grey},${grey},${grey})` : "#456";
        view.fillRect(i % side * scale, Math.floor(i / side) * scale, scale, scale);
      });
      $("#speed").textContent = `${Math.round(at / busy * 1000).toLocaleString("en")} pixels per second`;
      if (at < values.length) requestAnimationFrame(turn);
      else $("#answer").textContent = shares.indexOf(1);
    };
    turn();
  }
  pad.onpointerdown = (event) => {
    drawing = true;
    pad.setPointerCapture(event.pointerId);
    pen.strokeStyle = "#fff";
    pen.lineWidth = 1.9 * scale;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(event.offsetX, event.offsetY);
  };
  pad.onpointermove = (event) => {
    if (!drawing) return;
    pen.lineTo(event.offsetX, event.offsetY);
    pen.stroke();
  };
  pad.onpointerup = () => { drawing = false; read(); };
  $("#clear").onclick = clear;
  clear();
}
