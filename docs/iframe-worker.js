/* Browsers refuse Workers to pages opened from a disk; a hidden frame replaces the Worker of the search there. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<script src="${url}"><\/script>`;
      frame.onload = () => {
        this.frame = frame.contentWindow;
        this.frame.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
        this.waiting.forEach(data => this.postMessage(data));
      };
      document.body.append(frame);
    }

    postMessage(data) {
      if (this.frame) this.frame.dispatchEvent(new MessageEvent("message", {data}));
      else this.waiting.push(data);
    }
  };
}
