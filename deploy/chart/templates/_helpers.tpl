{{- define "fedsgcg.name" -}}
{{- printf "%s-%s" .Release.Name .Values.role | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "fedsgcg.labels" -}}
app.kubernetes.io/name: fedsgcg
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: {{ .Values.role }}
{{- end }}
