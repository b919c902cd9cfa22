// What web/extension.js takes from ComfyUI's front end, which is served beside it and has no types here.

declare module "*/scripts/api.js" {
  export const api: any;
}

declare module "*/scripts/app.js" {
  export const app: any;
}

declare const LiteGraph: any;
