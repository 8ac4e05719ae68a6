// Puts the properties of a machine-to-machine application into its tokens, as the switches in its page
// "Token customization" do: the management API can make applications, but not set these switches.
// docs/providers/kinde.md says how to install it.
import { createKindeAPI } from "@kinde/infrastructure";

export const workflowSettings = {
  id: "orgworkerApplicationProperties",
  name: "Application properties in M2M tokens",
  trigger: "m2m:token_generation",
  // A job must not run with half of its settings: without the properties there is no token, and the run waits.
  failurePolicy: { action: "stop" },
  bindings: {
    "kinde.m2mToken": {},
    "kinde.fetch": {},
    "kinde.env": {}, // KINDE_WF_M2M_CLIENT_ID and KINDE_WF_M2M_CLIENT_SECRET
    url: {},
  },
};

export default async function Workflow(event) {
  const { domains, application } = event.context;
  // Kinde lets nobody change tokens for its own API; one of them is requested below.
  if (event.request.auth.audience.includes(`${domains.kindeDomain}/api`)) {
    return;
  }
  const api = await createKindeAPI(event);
  const id = encodeURIComponent(application.clientId);
  const { data } = await api.get({ endpoint: `applications/${id}/properties` });
  const claim = {};
  for (const { key, value } of data.properties) {
    // An unset property has an empty value.
    if (value !== null && value !== undefined && value !== "") {
      claim[key] = { v: value };
    }
  }
  kinde.m2mToken.setCustomClaim("application_properties", claim);
}
