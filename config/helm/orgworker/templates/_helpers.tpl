{{/* The start of every name: the release, and the chart unless the release is named after it. */}}
{{- define "orgworker.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The labels that select the pods of one kind: (list $ KIND). They never change. */}}
{{- define "orgworker.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: orgworker
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of an object: (list $ KIND). */}}
{{- define "orgworker.labels" -}}
{{- $root := index . 0 -}}
{{ include "orgworker.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "orgworker.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* The start of a pod's spec: no rights. They are no values: nothing that orgworker does needs more. */}}
{{- define "orgworker.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "orgworker.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Where the pods of a kind run: its values. */}}
{{- define "orgworker.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* Liveness fails only if a loop stalls, which a restart fixes; never because the database is down. */}}
{{- define "orgworker.probes" -}}
startupProbe:
  httpGet: {path: /livez, port: health}
  periodSeconds: 2
  failureThreshold: 30
livenessProbe:
  httpGet: {path: /livez, port: health}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end -}}

{{/* Pods spread over nodes: (list $ KIND). */}}
{{- define "orgworker.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "orgworker.selector" . | nindent 8 }}
{{- end -}}

{{/* A volume for temporary files: its size, or "". */}}
{{- define "orgworker.work" -}}
- name: work
  emptyDir: {{ if . }}{sizeLimit: {{ . }}}{{ else }}{}{{ end }}
{{- end -}}

{{/* A peer of a NetworkPolicy: both selectors at once, since two entries would be either of them. */}}
{{- define "orgworker.peer" -}}
- namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ .namespace }}}
  podSelector:
    matchLabels: {{- toYaml .podLabels | nindent 6 }}
{{- end -}}

{{/* The content of host.toml; by default for the workers of this release. */}}
{{- define "orgworker.hostConfig" -}}
{{- if .Values.host.config -}}
{{- .Values.host.config -}}
{{- else if .Values.attempts.enabled -}}
{{- printf "[host]\ncontrol = [\"https://%s-attempts:8480\"]\n" (include "orgworker.name" .) -}}
{{- end -}}
{{- end -}}
