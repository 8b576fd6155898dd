// Puts the page together: the configuration, one panel for each person, the ledger.

import { Books } from "./books.js";
import { Causes } from "./causes.js";
import { h, setText } from "./dom.js";
import { Stage } from "./stage.js";
import { StreamerPanel } from "./streamer.js";
import { ViewerPanel } from "./viewer.js";

const TICK_MS = 250;

async function start() {
  const config = await readConfig();
  const streamer = config.users.find((user) => user.role === "streamer");
  const viewers = config.users.filter((user) => user.role === "viewer");
  const names = new Map(config.users.map((user) => [user.id, user.name]));
  const shared = {
    config,
    stage: new Stage(streamer.id, config.session_id),
    causes: new Causes(),
  };
  const viewerPanels = viewers.map((user) => new ViewerPanel({ ...shared, user, streamer }));
  const nameOf = (userId) => names.get(userId) ?? userId;
  const panels = [new StreamerPanel({ ...shared, user: streamer, nameOf }), ...viewerPanels];
  document.getElementById("panels").append(...panels.map((panel) => panel.root));
  document
    .getElementById("jump")
    .append(...panels.map((panel) => h("a", { href: `#${panel.root.id}` }, panel.user.name)));
  setText(document.getElementById("endpoint"), panels[0].client.address);
  new Books(viewerPanels);
  for (const panel of panels) panel.start();
  setInterval(() => panels.forEach((panel) => panel.tick()), TICK_MS);
}

async function readConfig() {
  const response = await fetch("/demo/config", { cache: "no-store" });
  if (!response.ok) throw new Error(`/demo/config answered ${response.status}`);
  return response.json();
}

start().catch((error) => {
  const fault = document.getElementById("fault");
  setText(fault, `The demo can't start: ${error.message}. Is “duet demo” running? Then reload this page.`);
  fault.hidden = false;
});
